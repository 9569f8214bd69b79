"""Public data sets: one file each, from a download in its official layout to rows."""
