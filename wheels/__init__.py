"""What is published: `make wheels` builds it into dist/, and checks it. docs/install.md says who needs which."""
