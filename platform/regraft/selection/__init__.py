"""Selection: ranking trials and judging challengers. Pure functions of records."""
