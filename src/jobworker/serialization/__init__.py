"""Plain values and JSON: attrs classes of them and back, text of them and back."""
