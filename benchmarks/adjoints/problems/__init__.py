"""The problems, a file for each kind: `contract` says what such a file gives."""
