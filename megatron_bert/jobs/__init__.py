"""What a scheduler's job scripts ask: how to start on the ranks they got, and whether to go on."""
