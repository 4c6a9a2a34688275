// Runs before every other script of the page.
(function () {
  // Font Awesome watches the page and would replace the <i> of the Play
  // widget, whose update then throws: let it convert once and no more.
  window.FontAwesomeConfig = { observeMutations: false };
  // html-manager takes its asset folder from require's baseUrl, by default the
  // folder of the page: point it at the local copy, at any depth of page.
  var script = document.currentScript;
  if (script.dataset.npm)
    window.require = {
      baseUrl: new URL(script.dataset.npm, script.src).href,
      waitSeconds: 60,
    };
})();

window.addEventListener("load", function () {
  // Sliders reach screen readers with a role but without a name.
  var name = function () {
    var handles = ".widget-slider .noUi-handle:not([aria-label])";
    document.querySelectorAll(handles).forEach(function (handle) {
      var slider = handle.closest(".widget-slider");
      var label = slider.querySelector(".widget-label");
      if (label && label.textContent)
        handle.setAttribute("aria-label", label.textContent);
    });
  };
  // Wide tables scroll inside their own box, also with the keyboard.
  document.querySelectorAll("article table").forEach(function (table) {
    var box = table.closest(".pst-scrollable-table-container, .mc-scroll");
    if (!box) {
      box = document.createElement("div");
      box.className = "mc-scroll";
      table.parentNode.insertBefore(box, table);
      box.appendChild(table);
    }
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  });
  var widgets = document.querySelector("script[type*='jupyter.widget']");
  if (!widgets) return;
  new MutationObserver(name).observe(document.body, {
    childList: true,
    subtree: true,
  });
  name();
});
