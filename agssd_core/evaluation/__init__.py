"""Features, probes, pictures and exports."""
