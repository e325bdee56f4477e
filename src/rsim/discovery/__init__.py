"""A strategy set that grows: what goes wrong (`failures`), what might help (`propose`), a planner for the new set (`adapt`)."""
