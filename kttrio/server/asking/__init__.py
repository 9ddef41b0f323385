"""What the bodies of several protocols have in common."""
