"""What all programs share: options, how errors end them, places of outputs."""
