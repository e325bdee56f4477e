"""What runs inside the verifiers' sandbox: third-party libraries that read answers (see
`rsim.rewards.symbolic`)."""
