"""The contestants, a file for each library or idea: `contract` says what such a file gives."""
