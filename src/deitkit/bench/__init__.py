"""How fast this machine trains and classifies: measured as a user would run it, beside what the machine could do."""
