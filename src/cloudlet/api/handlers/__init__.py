"""What each operation does: plain functions of what was asked, a file for each noun."""
