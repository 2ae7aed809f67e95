// What the page does beyond reading: DataTables (sort, filter) and Vega (hover, click) take over a table or a chart when
// it comes near the window, so that a page of thousands of runs opens at once.
const charts = JSON.parse(document.getElementById("charts").textContent);
DataTable.ext.errMode = "none";
Object.assign(DataTable.defaults, {
  paging: false, order: [], autoWidth: false, layout: { topStart: "search", topEnd: "info", bottomStart: null, bottomEnd: null },
  columnDefs: [{ targets: "pick", columnControl: [["searchList"]] }, { targets: "_all", columnControl: [["search"]] }],
});
const live = {
  TABLE: (table) => new DataTable(table),
  FIGURE: (figure) => {
    const [group, name] = figure.dataset.chart.split("/");
    const spec = { ...charts[group].charts[name], datasets: charts[group].datasets };
    const actions = { export: true, source: false, compiled: false, editor: false };
    const place = document.createElement("div");
    vegaEmbed(place, spec, { ast: true, renderer: "svg", actions, logLevel: 1 })
      .then(() => figure.replaceChildren(place));
  },
};
const watch = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) {
      watch.unobserve(target);
      live[target.tagName](target);
    }
  }
}, { rootMargin: "300px" });
document.querySelectorAll("table.sort, figure[data-chart]").forEach((each) => watch.observe(each));
