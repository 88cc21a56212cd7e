"""The down projection's and the activation's backward."""
