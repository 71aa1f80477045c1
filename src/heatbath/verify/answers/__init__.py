"""Mathematical answers: read, valued and compared without computer algebra, every step bounded."""
