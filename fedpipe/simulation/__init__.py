"""The real cores on virtual time: a fleet, its faults and its end, all drawn from one seed."""
