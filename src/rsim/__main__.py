from rsim.cli.main import main

main()
