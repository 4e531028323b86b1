"""The report, a file for each section: what it measures (`measure`) and how it says it (`words`)."""
