"""What happens to a data set on its way to the model: columns, labels, truncation, packing, collation."""
