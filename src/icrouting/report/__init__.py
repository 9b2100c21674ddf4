"""Report: records, to figures, tables and pages."""
