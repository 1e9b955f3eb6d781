"""Teachers: prepared, checked by the gate, frozen, and their logits cached."""
