"""The programs behind every performance figure. A package, so that no installed one of this name takes its place."""
