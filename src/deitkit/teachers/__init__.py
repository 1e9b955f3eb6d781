"""Teachers: preparing, checking (the gate), freezing, and caching their logits."""
