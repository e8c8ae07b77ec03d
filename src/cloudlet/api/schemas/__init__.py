"""What goes over the wire: bodies, queries and views, a file for each noun."""
