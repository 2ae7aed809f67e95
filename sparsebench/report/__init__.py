"""`sparsebench-report`: many records on one page. rows.py reads and groups, tables.py and charts.py show, page.py writes."""
