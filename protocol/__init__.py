"""What both sides must agree on: topics, messages, codec, tensors, transfers; plus the bus and the daemons' scaffolding."""
