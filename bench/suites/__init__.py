"""The suites: one pytest file each, with `cases(settings)`, `build(group, settings)` and a test."""
