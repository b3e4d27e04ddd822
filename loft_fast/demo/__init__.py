"""The demonstration behind `loft-fast demo`: a digit classifier forgets, next to one retrained without the digit."""
