"""Steps, schedules, monitors and local rounds."""
