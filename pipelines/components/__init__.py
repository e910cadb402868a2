"""What a saved model consists of: one self-contained, exportable class per file."""
