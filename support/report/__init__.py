"""The report, a file for each section: what it measures (`measure`), how it says it (`words`)."""
