"""The probe model: how it is trained, its data, and helpers that read them."""
