"""The speed of the ops and of whole networks, beside batch norm, the bare activation and a copy."""
