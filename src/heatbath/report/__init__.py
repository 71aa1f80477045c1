"""From the files of a run to a page one would rather look at than read."""
