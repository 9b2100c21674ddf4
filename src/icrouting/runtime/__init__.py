"""Runtime: what knows nothing of models: processes, locks, files, checks, pages."""
