"""Learning from images; knows nothing of federations."""
