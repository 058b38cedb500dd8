"""fastlm inside other libraries: their models and loops, fastlm's loss and optimizer."""
