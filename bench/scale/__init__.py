"""How cost grows with agents, tensors, bytes and columns; and 10,000 light agents on the control plane."""
