"""Ready recipes. Each says what it needs and cites its source."""
