"""What do the results say? Files of results as a page, as the comment of a pull request, as JUnit's XML."""
