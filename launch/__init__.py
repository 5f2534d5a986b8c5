"""How a recipe gets onto machines: one `Job`, rendered as text for each target. Standard library only."""
