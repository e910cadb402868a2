"""What a saved model consists of: one exportable class per file."""
