"""What a person reads of a run folder: tables, figures, the page. Nothing here computes a result."""
