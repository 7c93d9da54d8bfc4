"""Images and reports of what a model did."""
