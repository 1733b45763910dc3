"""The measured comparisons: ratios of two things measured in turn in one run."""
