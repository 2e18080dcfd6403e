"""What programs cost: planned by the compiler for machines that are not there, measured on the one at hand."""
