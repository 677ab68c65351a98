"""From scored completions to a loss: whose credit what is, how it is packed, and which objective reads it."""
