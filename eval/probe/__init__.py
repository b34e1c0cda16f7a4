"""The probe model: its weights, its data, and helpers that read them."""
