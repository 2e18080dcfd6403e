"""One module per training method; each offers `make_train_step` with the same signature."""
