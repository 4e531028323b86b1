"""The machinery downstairs: what someone who reads how a JEM works need not open."""
