"""Public benchmarks as the Skywork-R1V3 report runs them: asked, kept, scored and tabled."""
