"""How are results shown? As a page, as the comment of a pull request, or as JUnit's XML."""
