"""A strategy set that grows: a planner for another set (`adapt`), and what is new tried in training (`grow`)."""
